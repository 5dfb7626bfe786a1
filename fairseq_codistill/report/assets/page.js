// Owns what moves in the page of codistill-report: the curves, over updates or over time, and light or dark. The data are
// in the page; it must never fetch anything. live.js, where the page is served, hands it the next state of the runs.
"use strict";
(() => {
    let charts = JSON.parse(document.getElementById("curves").textContent);
    const root = document.documentElement;
    const report = document.getElementById("report");
    const figures = () => [...report.querySelectorAll("figure[data-chart]")];
    const plots = new Map();
    const hidden = new Map(); // name of a chart -> labels of the curves that a person has hidden
    const DASHES = [[], [8, 5], [2, 4], [9, 4, 2, 4]];
    const NUM_COLOURS = 8;
    const HEIGHT = 230;
    const zooms = new Map(); // group -> the part of the axis that was chosen
    let overTime = false;

    const kept = (name) => { try { return localStorage.getItem(name); } catch { return null; } };
    const keep = (name, value) => { try { localStorage.setItem(name, value); } catch { /* a file may keep nothing */ } };
    const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
    const plain = (value) => value == null ? "–" : Math.abs(value) >= 1e4
        ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(4)));

    // Seconds, minutes or hours, by how long the whole lasted.
    function timeUnit(chart) {
        const longest = Math.max(...chart.curves.flatMap((curve) => curve.points.map((point) => point[1] ?? 0)));
        return longest > 7200 ? ["hours", 3600] : longest > 120 ? ["minutes", 60] : ["seconds", 1];
    }

    // Points in the order of x; a model that went over an update again shows what it logged last.
    function columns(chart, asTime, unit) {
        return uPlot.join(chart.curves.map((curve) => {
            const rows = new Map();
            for (const [update, seconds, value] of curve.points) {
                const x = asTime ? seconds : update;
                if (x != null) rows.set(x / unit, value);
            }
            const xs = [...rows.keys()].sort((a, b) => a - b);
            return [xs, xs.map((x) => rows.get(x))];
        }));
    }

    // The value at the cursor, or the last one before it: models do not log at the same updates.
    function lastValue(plot, _value, series, index) {
        const values = plot.data[series];
        for (let i = index ?? values.length - 1; i >= 0; i--) if (values[i] != null) return plain(values[i]);
        return "–";
    }

    function axis(label, isY) {
        const grid = { stroke: colour("--line"), width: 1 };
        return {
            label, grid, ticks: { ...grid, size: 5 }, stroke: colour("--quiet"), font: "12px system-ui", labelFont: "12px system-ui",
            labelSize: 18, gap: 4,
            values: (_plot, splits) => splits.map((split) => split == null ? "" : plain(split)),
            size: isY ? (_plot, values) => 13 + 7 * Math.max(2, ...(values ?? []).map((text) => text.length)) : 26,
        };
    }

    // For whoever drives the page: which part of the axis is shown.
    function note(figure, plot, scale) {
        if (scale === "x") figure.dataset.shown = `${plot.scales.x.min} ${plot.scales.x.max}`;
    }

    // Charts with the same axis zoom together: those of a run, but not those over bits. Without a range, back to the whole.
    function zoom(group, range) {
        if (range) zooms.set(group, range); else zooms.delete(group);
        for (const [figure, plot] of plots) if (groupOf(figure) === group) showPart(plot, range);
    }
    const groupOf = (figure) => figure.dataset.group + charts[Number(figure.dataset.chart)].over;
    const nameOf = (figure) => `${figure.dataset.group} ${figure.dataset.key}`;
    function showPart(plot, range) {
        if (range) plot.setScale("x", { min: range[0], max: range[1] }); else plot.setData(plot.data, true);
    }
    function chosen(figure, plot) {
        const { left, width } = plot.select;
        if (width === 0) return;
        plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        zoom(groupOf(figure), [left, left + width].map((position) => plot.posToVal(position, "x")));
    }

    // What cannot change while a plot stays: its curves, its axis, and whether its points are marked.
    const shape = (chart) => JSON.stringify([overTime && chart.over === "updates" && timeUnit(chart),
        chart.curves.map((curve) => [curve.label, curve.number, curve.dash, curve.points.length < 30])]);

    function build(figure) {
        const chart = charts[Number(figure.dataset.chart)];
        plots.get(figure)?.destroy();
        const isUpdates = chart.over === "updates";
        const asTime = overTime && isUpdates;
        const [unitName, unit] = asTime ? timeUnit(chart) : [isUpdates ? "updates" : "sent by a device (Mbit)", 1];
        const data = columns(chart, asTime, unit);
        const dashes = chart.curves.map((curve) => (curve.dash + Math.floor(curve.number / NUM_COLOURS)) % DASHES.length);
        const series = chart.curves.map((curve, i) => ({
            label: curve.label, stroke: colour(`--c${curve.number % NUM_COLOURS}`), width: curve.number === 0 ? 2.4 : 1.3,
            dash: DASHES[dashes[i]], spanGaps: true,
            show: !hidden.get(nameOf(figure))?.has(curve.label),
            value: lastValue, points: { show: curve.points.length < 30, size: 5 },
        }));
        const options = {
            width: figure.clientWidth - 20, height: HEIGHT,
            cursor: {
                drag: { x: true, y: false, dist: 5, setScale: false }, focus: { prox: 24 }, y: false,
                bind: { dblclick: () => () => zoom(groupOf(figure), null) },
                sync: { key: groupOf(figure) },
            },
            focus: { alpha: 0.35 },
            legend: {
                markers: {
                    fill: (_plot, i) => dashes[i - 1] ? "transparent" : series[i - 1].stroke,
                    stroke: (_plot, i) => series[i - 1].stroke,
                    width: (_plot, i) => dashes[i - 1] ? 2 : 0,
                    dash: (_plot, i) => ["solid", "dashed", "dotted", "double"][dashes[i - 1]],
                },
            },
            hooks: {
                setScale: [(plot, scale) => note(figure, plot, scale)],
                setSelect: [(plot) => chosen(figure, plot)],
                setSeries: [(plot) => hidden.set(nameOf(figure), new Set(plot.series.slice(1).filter((one) => !one.show).map((one) => one.label)))],
            },
            scales: {
                x: { time: false, distr: isUpdates ? 1 : 3 },
                y: chart.from_zero ? { range: (_plot, _low, high) => [0, high > 0 ? high * 1.06 : 1] } : {},
            },
            axes: [axis(unitName, false), axis(chart.unit, true)],
            series: [{ label: unitName, value: (plot, value) => plain(value ?? plot.data[0].at(-1)) }, ...series],
        };
        const plot = new uPlot(options, data, figure);
        plots.set(figure, plot);
        plot.shape = shape(chart);
        if (zooms.has(groupOf(figure))) showPart(plot, zooms.get(groupOf(figure)));
        figure.style.minHeight = "0";
    }

    // A page of many runs has hundreds of curves: each is drawn when it comes into view.
    const seen = new IntersectionObserver((entries) => {
        for (const { isIntersecting, target } of entries) if (isIntersecting && !plots.has(target)) build(target);
    }, { rootMargin: "400px" });
    const sized = new ResizeObserver((entries) => {
        for (const { target } of entries) plots.get(target)?.setSize({ width: target.clientWidth - 20, height: HEIGHT });
    });
    const watch = (figure) => { seen.observe(figure); sized.observe(figure); };
    figures().forEach(watch);
    addEventListener("beforeprint", () => figures().filter((figure) => !plots.has(figure)).forEach(build));

    const rebuild = () => [...plots.keys()].forEach(build);
    const buttons = [...document.querySelectorAll("button[data-axis]")];
    function mark() {
        const hasTime = charts.some((chart) => chart.curves.some((curve) => curve.points.some((point) => point[1] != null)));
        overTime = wanted === "time" && hasTime;
        for (const button of buttons) {
            button.setAttribute("aria-pressed", String((button.dataset.axis === "time") === overTime));
            button.disabled = button.dataset.axis === "time" && !hasTime;
        }
    }
    let wanted = "updates";
    function choose(name) {
        wanted = name;
        zooms.clear();
        mark();
        rebuild();
    }
    for (const button of buttons) {
        button.addEventListener("click", () => { keep("codistill-axis", button.dataset.axis); choose(button.dataset.axis); });
    }
    document.getElementById("reset").addEventListener("click", () => {
        zooms.clear();
        plots.forEach((plot) => showPart(plot, null));
    });

    const dark = matchMedia("(prefers-color-scheme: dark)");
    const theme = document.getElementById("theme");
    function dress() {
        root.dataset.theme = kept("codistill-theme") ?? (dark.matches ? "dark" : "light");
        theme.textContent = root.dataset.theme === "dark" ? "Light" : "Dark";
        rebuild();
    }
    theme.addEventListener("click", () => {
        keep("codistill-theme", root.dataset.theme === "dark" ? "light" : "dark");
        dress();
    });
    dark.addEventListener("change", dress);
    dress();
    for (const figure of figures()) if (figure.getBoundingClientRect().top < innerHeight + 400) build(figure);
    choose(new URLSearchParams(location.search).get("axis") ?? kept("codistill-axis") ?? "updates");

    const made = document.querySelector("time");
    function age() {
        const minutes = Math.round((Date.now() - Date.parse(made.dateTime)) / 60000);
        const [number, unit] = minutes < 60 ? [minutes, "minute"] : minutes < 2880
            ? [Math.round(minutes / 60), "hour"] : [Math.round(minutes / 1440), "day"];
        document.getElementById("age").textContent = minutes < 1 ? "just now" : `${number} ${unit}${number === 1 ? "" : "s"} ago`;
    }
    age();
    setInterval(age, 30000);

    // The next state of the runs: text and curves are new; what a person has chosen, hidden, unfolded and zoomed stays.
    function replace(html, nextCharts, madeIso, madeText) {
        const fresh = document.createElement("template");
        fresh.innerHTML = html;
        const open = new Set([...report.querySelectorAll("details[open]")].map((one) => one.dataset.key));
        for (const details of fresh.content.querySelectorAll("details")) details.open = open.has(details.dataset.key);
        const drawn = new Map([...plots.keys()].map((figure) => [nameOf(figure), figure]));
        const across = new Map([...report.querySelectorAll("table")].map((table, i) => [i, table.scrollLeft]));
        charts = nextCharts;
        mark();
        for (const place of fresh.content.querySelectorAll("figure[data-chart]")) {
            const figure = drawn.get(nameOf(place));
            if (!figure) continue;
            figure.dataset.chart = place.dataset.chart;
            place.replaceWith(figure);
            drawn.delete(nameOf(figure));
        }
        for (const figure of drawn.values()) {
            plots.get(figure).destroy();
            plots.delete(figure);
            seen.unobserve(figure);
            sized.unobserve(figure);
        }
        report.replaceChildren(fresh.content);
        [...report.querySelectorAll("table")].forEach((table, i) => { table.scrollLeft = across.get(i) ?? 0; });
        for (const figure of figures()) {
            const plot = plots.get(figure);
            const chart = charts[Number(figure.dataset.chart)];
            if (!plot) { watch(figure); continue; }
            if (plot.shape !== shape(chart)) { build(figure); continue; }
            const asTime = overTime && chart.over === "updates";
            plot.setData(columns(chart, asTime, asTime ? timeUnit(chart)[1] : 1), true);
            if (zooms.has(groupOf(figure))) showPart(plot, zooms.get(groupOf(figure)));
        }
        made.dateTime = madeIso;
        made.textContent = madeText;
        age();
    }
    window.codistillReport = { replace };
})();
