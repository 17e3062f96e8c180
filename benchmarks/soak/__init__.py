"""The connector under fire: real engines, real load, faults by a seeded schedule, and a report that counts each."""
