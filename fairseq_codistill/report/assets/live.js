// Owns that a served page keeps up with its runs: it asks its server for the next state and hands it to page.js. It asks
// nobody else, and while nobody looks at it, nothing.
"use strict";
(() => {
    const link = document.getElementById("link");
    const everyMs = Number(link.dataset.every) * 1000;
    const PATIENCE_MS = 30000; // a server that does not answer for so long is gone
    let version = "", timer = 0, isAsking = false;

    function say(isOn, text) {
        link.className = isOn ? "on" : "off";
        if (link.textContent !== text) link.textContent = text;
    }

    async function ask() {
        if (isAsking) return;
        isAsking = true;
        try {
            const headers = version ? { "If-None-Match": version } : {};
            const answer = await fetch("page.json", { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
            if (answer.status === 200) {
                const state = await answer.json();
                version = answer.headers.get("ETag") ?? "";
                window.codistillReport.replace(state.body, state.charts, state.made, state.made_text);
            } else if (answer.status !== 304) {
                throw new Error(`the server answers ${answer.status}`);
            }
            say(true, "up to date");
        } catch {
            if (link.className !== "off") say(false, `no answer since ${new Date().toTimeString().slice(0, 8)}`);
        } finally {
            isAsking = false;
            clearTimeout(timer);
            if (!document.hidden) timer = setTimeout(ask, everyMs);
        }
    }
    document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });
    say(true, "up to date");
    ask();
})();
