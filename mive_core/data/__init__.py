"""Training pairs: imported from published datasets, composed and rated; and the code that processes many of them."""
