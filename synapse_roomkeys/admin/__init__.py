"""What an operator does with the backups of all users, by a command or over HTTP."""
