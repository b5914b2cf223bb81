"""The chat page in a real browser, against real processes: API, worker, Valkey, Postgres. Only the model is the test's own."""
