// What stands on a page of JupyterLab with one notebook open; lab_page.py asks for it.
window.look = (() => {
    const all = (what, within = document) => [...within.querySelectorAll(what)];
    const texts = (what, within) => all(what, within).map(one => one.innerText);
    // Lab renders the error of a cell as what it wrote to stderr
    const tracebacks = within => texts('[data-mime-type$=stderr], [data-mime-type$=error]', within)
        .filter(text => text.includes('Traceback'));
    const lacking = one => [one.className || one.tagName, one.scrollWidth - one.clientWidth];
    const scrolls = one => ['auto', 'scroll'].includes(getComputedStyle(one).overflowX);

    const cells = () => all('.jp-Notebook .jp-Cell').map(cell => ({
        is_code: cell.classList.contains('jp-CodeCell'),
        prompt: all('.jp-InputPrompt', cell)[0]?.textContent ?? '',
        tracebacks: tracebacks(cell),
        images: all('.jp-OutputArea img', cell).map(one => [one.naturalWidth, one.naturalHeight]),
        lacking: [
            ...all('.jp-OutputArea-output, .jp-MarkdownOutput, .jp-CodeCell .cm-scroller', cell),
            ...all('.jp-OutputArea-output *, .jp-MarkdownOutput *', cell).filter(scrolls),
        ].map(lacking),
    }));

    const page_lacking = () => [document.scrollingElement, ...all('.jp-WindowedPanel-outer')].map(lacking);

    const progress = () => ({
        prompts: all('.jp-Notebook .jp-CodeCell .jp-InputPrompt').map(one => one.textContent),
        failed: tracebacks().at(-1),
        dialog: all('.jp-Dialog')[0]?.innerText,
        status: all('#jp-main-statusbar')[0]?.innerText ?? '',
    });

    // Lab runs no cell behind one that has failed; a dialog says that the kernel died.
    const ran = () => {
        const { prompts, failed, dialog, status } = progress();
        const over = failed ? !prompts.some(one => one.includes('*')) : prompts.every(one => /\d/.test(one));
        return Boolean(dialog) || (over && status.includes('| Idle'));
    };

    const frame = () => new Promise(requestAnimationFrame);
    const drawn = () => document.fonts.ready.then(frame).then(frame);

    return { cells, page_lacking, progress, ran, drawn };
})();
