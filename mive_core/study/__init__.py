"""Studies: experiments that back the project's choices, each run by one command."""
