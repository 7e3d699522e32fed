"""Networks. They know no cache: the past comes in as arguments, new keys/values go out."""
