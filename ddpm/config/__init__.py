"""Command lines and JSON files in; frozen dataclasses out, each field with its check next to it."""
