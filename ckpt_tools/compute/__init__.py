"""Compute: sums, comparisons and checksums of payload."""
