// Before anything is shown, so that nothing flashes: what was chosen last, or else what the system prefers.
try { document.documentElement.dataset.theme = localStorage.getItem("codistill-theme") ?? ""; } catch { /* keeps nothing */ }
document.documentElement.dataset.theme ||= matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
