// Tokens per second of llama.cpp on the CPU: node llama_cpp.mjs NODE_MODULES MODEL THREADS TOKENS
// prints {"release": ..., "rates": [...]}, one rate for each of five texts.
import {pathToFileURL} from "node:url";

const [modules, modelPath, threads, tokens] = process.argv.slice(2);
const entry = pathToFileURL(`${modules}/node-llama-cpp/dist/index.js`);
const {getLlama} = await import(entry);
const options = {gpu: false, build: "never", maxThreads: Number(threads), logLevel: "error"};
const llama = await getLlama(options);
const model = await llama.loadModel({modelPath, useMmap: false});
const context = await model.createContext({contextSize: 256, threads: Number(threads)});
const sequence = context.getSequence();
const prompt = Array.from({length: 16}, (_, i) => i);

async function rate(count) {
    await sequence.clearHistory();
    let made = 0, start;
    for await (const _ of sequence.evaluate(prompt, {temperature: 0})) {
        if (made === 0) start = performance.now();
        if (made++ === count) break;
    }
    return count / ((performance.now() - start) / 1000);
}

await rate(4);
const rates = [];
for (let i = 0; i < 5; i++) rates.push(await rate(Number(tokens)));
console.log(JSON.stringify({release: llama.llamaCppRelease.release, rates}));
process.exit(0);
