"""The steps of the road, made fast. What they compute is the road's; a reader may leave this wing for later."""
