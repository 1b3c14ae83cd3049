"""One file for each library whose SAEs are read or written here."""
