"""What an operator touches: metrics, health over HTTP, the doctor, files into topics."""
