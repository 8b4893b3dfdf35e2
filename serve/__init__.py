"""Publishing and engines: the model card, the Hub, exports, checks against real servers."""
