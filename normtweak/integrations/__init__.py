"""Other people's engines, one file each, imported only by whoever wants them."""
