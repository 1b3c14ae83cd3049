"""SAEs of ours for other libraries, and theirs for ours."""
