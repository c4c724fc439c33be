"""What no log, metric or error may hold."""

import re

#: The tokens of either kind of homeserver, and what the contract's scenarios and the
#: tests of secrets have in ``session_data`` and ``auth_data``.
SECRET = re.compile(
    rb"""token_0\d{19}|syt_\w{6,}|["']secret["']|ed25519:c["']|MaRkEr|OF-THE-LOG-TEST"""
)
