"""Storage: reading and writing bytes; all file calls to the operating system are here."""
