"""GPU: sums on devices, behind one seam of the engine."""
