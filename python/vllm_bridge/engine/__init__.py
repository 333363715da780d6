"""The engine of a worker: its plan, its start, and what it is asked."""
