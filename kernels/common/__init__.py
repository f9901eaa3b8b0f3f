"""What the operators share: registration, launches, checks. It knows no operator."""
