"""Several guesses checked in one pass: who guesses, how much, and why that changes no probability."""
