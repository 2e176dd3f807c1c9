"""Remote: objects of stores in the network, and files of repositories, as paths; see `addresses`.

Nothing of it is loaded, and none of the libraries for it, unless a job is given an address.
"""

from .addresses import Address, as_address

__all__ = ["Address", "as_address"]
