"""How fast, how large, how good and what is inside: nothing here is on the way from a prompt to a token."""
