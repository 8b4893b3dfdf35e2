"""What writes and checks the documents; nothing of it is in the wheel."""
