"""What the daemon remembers from one life to the next, each in a small file of its own in the state folder."""
