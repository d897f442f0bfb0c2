"""Result files as types: the JSON Schema, the writer and the reader of each file come from its records."""
