// Before the first paint, so that nothing flashes. No module: those run later.
try {
  const theme = localStorage.getItem("twolane-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // No storage: the system's theme it is.
}
