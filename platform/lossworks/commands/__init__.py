"""Commands of the library itself; those of a room lie in the room."""
