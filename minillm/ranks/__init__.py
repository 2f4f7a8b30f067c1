"""One model over several processes: what a rank holds, and how ranks talk."""
