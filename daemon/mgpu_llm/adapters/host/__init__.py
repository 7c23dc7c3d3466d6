"""The host around the engine: what is seen of it once an attempt has failed, and what is installed for the engine.
Everything here blocks, and may for long."""
