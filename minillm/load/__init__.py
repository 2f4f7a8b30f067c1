"""From a checkpoint's files to a decoder with weights. Nothing on the road imports this wing but `llm.py`."""
