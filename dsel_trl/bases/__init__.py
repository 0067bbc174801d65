"""What families of methods share: a method of one's own starts here."""
