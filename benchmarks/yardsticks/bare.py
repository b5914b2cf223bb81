"""bare: an empty route."""

from __future__ import annotations

from fastapi import FastAPI

app = FastAPI()


@app.post("/api/conversations/{conversation_id}/messages", status_code=201)
async def add_message(conversation_id: int) -> None:
    return None
