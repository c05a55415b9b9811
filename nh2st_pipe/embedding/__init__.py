"""Stage one: every tile of every slide through a frozen encoder, once, into the store."""
