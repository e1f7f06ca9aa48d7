"""Device code of pymoe; a package only so that installers carry it."""
