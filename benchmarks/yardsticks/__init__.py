"""What Chatkeep is measured against: each written as a good engineer would write it in an hour, and served like Chatkeep, by one uvicorn.

    bare         an empty FastAPI route: what no API on this machine can be faster than
    in_memory    "dict": the system that Chatkeep replaces; everything is gone when the process ends
    direct       FastAPI, SQLModel, psycopg2: one transaction for each message
    best_direct  FastAPI, asyncpg: one `INSERT … ON CONFLICT DO NOTHING` for each message, and nothing else

All of them take the same requests: the same paths, JSON bodies and bearer tokens.
"""
