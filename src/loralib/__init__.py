"""The import name of loralib, served by lorafold."""
