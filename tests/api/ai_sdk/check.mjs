// Talks to a session as a chat front end built on Vercel's AI SDK does, and prints what came of it as JSON.
// node check.mjs <base url> <token> <session> <message>    a turn
// node check.mjs <base url> <token> <session>              resume
import { DefaultChatTransport, readUIMessageStream } from 'ai';

const [base, token, session, message] = process.argv.slice(2);
const transport = new DefaultChatTransport({
  api: `${base}/api/chat`,
  headers: { Authorization: `Bearer ${token}`, 'x-vercel-ai-ui-message-stream': 'v1' },
  prepareSendMessagesRequest: ({ id, messages, headers }) => ({
    api: `${base}/api/chat/${id}/message`,
    headers,
    body: { message: messages.at(-1).parts.map((part) => part.text).join('') },
  }),
});

const stream = message === undefined
  ? await transport.reconnectToStream({ chatId: session })
  : await transport.sendMessages({
      trigger: 'submit-message',
      chatId: session,
      messageId: undefined,
      messages: [{ id: '1', role: 'user', parts: [{ type: 'text', text: message }] }],
      abortSignal: undefined,
    });

let last = null;
const types = [];
if (stream !== null) {
  const [seen, read] = stream.tee();
  const counting = (async () => { for await (const chunk of seen) types.push(chunk.type); })();
  for await (const ui of readUIMessageStream({ stream: read, onError: (error) => types.push(`failed: ${error}`) })) last = ui;
  await counting;
}
console.log(JSON.stringify({ nothing: stream === null, types, role: last?.role, text: last?.parts.filter((part) => part.type === 'text').map((part) => part.text).join('') }));
