// Before anything is painted: the theme that was chosen on this device. Without a choice, the system's.
const theme = JSON.parse(localStorage.getItem("chatkeep:theme") ?? "null");
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
