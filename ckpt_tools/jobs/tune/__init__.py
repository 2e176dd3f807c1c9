"""Tune: a checkpoint whose classifier, or more, is trained after averaging."""
