"""Storage: bytes without meaning; every call to the operating system for a file is here."""
