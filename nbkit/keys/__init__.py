"""Keys of requests behind context templates, the second moments of ordinary keys, and the geometry of both."""

from nbkit.keys.extract import keys, keys_and_values, keys_in_contexts, token_keys

__all__ = ["keys", "keys_and_values", "keys_in_contexts", "token_keys"]
