// Full attention in llama.cpp, through node-llama-cpp of a folder that is given; see protocol.py for what is asked here.
//
// Nothing is built or downloaded: without the package's prebuilt binary there is an error.

import fs from "node:fs";
import {createRequire} from "node:module";
import path from "node:path";
import readline from "node:readline";
import {pathToFileURL} from "node:url";

const SETTINGS = [512, 2048].flatMap((batchSize) => [false, true].map((flashAttention) => ({batchSize, flashAttention})));

const state = {sequences: {}};

async function load({folder, model, threads, new_tokens}) {
    const entry = createRequire(path.resolve(folder) + path.sep).resolve("node-llama-cpp");
    const {version} = JSON.parse(fs.readFileSync(path.join(path.dirname(entry), "..", "package.json")));
    const {getLlama} = await import(pathToFileURL(entry));
    const llama = await getLlama({
        gpu: false, build: "never", skipDownload: true, progressLogs: false, maxThreads: threads, logLevel: "error",
        logger: (level, message) => process.stderr.write(message)
    });
    Object.assign(state, {model: await llama.loadModel({modelPath: model}), threads, new_tokens});
    const {release} = llama.llamaCppRelease;
    return {versions: {node: process.versions.node, "node-llama-cpp": version, "llama.cpp": release}};
}

// Tries every setting on this prompt; runs of the method then have the fastest one.
async function warm_up({method, ids}) {
    const tried = [];
    let best = null;
    for (const setting of SETTINGS) {
        const context = await state.model.createContext({
            ...setting,
            contextSize: ids.length + state.new_tokens,
            threads: {ideal: state.threads, min: state.threads}
        });
        const sequence = context.getSequence();
        const {seconds} = await answer(sequence, ids);
        const {contextSize} = context;
        tried.push({...setting, contextSize, seconds});
        if (best && best.seconds.total <= seconds.total) {
            await context.dispose();
            continue;
        }
        await best?.context.dispose();
        best = {context, sequence, seconds, settings: {...setting, contextSize}};
    }
    state.sequences[method] = best.sequence;
    return {settings: {...best.settings, kvCache: "F16"}, tried};
}

async function run({method, ids}) {
    await state.sequences[method].clearHistory();
    return await answer(state.sequences[method], ids);
}

async function answer(sequence, ids) {
    const started = performance.now();
    const generated = sequence.evaluate(ids, {temperature: 0, yieldEogToken: true});
    const tokens = [(await generated.next()).value];
    const prefilled = performance.now();
    while (tokens.length < state.new_tokens)
        tokens.push((await generated.next()).value);
    const ended = performance.now();
    await generated.return();
    const [prefill, decode, total] = [prefilled - started, ended - prefilled, ended - started].map((ms) => ms / 1000);
    return {seconds: {prefill, decode, total}, tokens, held: ids.length};
}

const actions = {load, warm_up, run};
for await (const line of readline.createInterface({input: process.stdin})) {
    const {action, ...given} = JSON.parse(line);
    let reply;
    try {
        reply = await actions[action](given);
    } catch (error) {
        reply = {error: String(error).split("\n")[0]};
    }
    process.stdout.write(JSON.stringify(reply) + "\n");
}
process.exit();
