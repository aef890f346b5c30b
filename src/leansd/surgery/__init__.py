"""Surgery: UNets cut, assembled and changed by address."""
