"""What commands and methods are told: options declared once, with their help, bounds and modes. No torch, no typer."""
