"""The room that knows TRL."""
