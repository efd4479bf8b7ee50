"""What plug-ins and this project test themselves with."""
