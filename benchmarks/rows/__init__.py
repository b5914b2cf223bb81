"""The rows of the table: each function measures one or several of them side by side, and says in its docstring what it compares."""
