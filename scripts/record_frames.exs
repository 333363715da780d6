# Records what a real engine and the library say to each other: the frames that
# the fuzz tests of both sides change.
#
#     mix run scripts/record_frames.exs > test/support/frames.txt
#
# A line is a frame without its length, in hexadecimal: "> " to the worker, "< " from it.

Logger.configure(level: :error)

defmodule Recorder do
  alias VLLM.Bridge.Frames

  @max_frame 64 * 1024 * 1024

  # What the owner of a port receives, and what anybody writes to it.
  def start do
    {:ok, pid} = Agent.start_link(fn -> [] end)
    recorder = spawn_link(fn -> loop(pid, %{}) end)
    :erlang.trace_pattern({:erlang, :port_command, 3}, true, [])
    :erlang.trace(:new_processes, true, [:receive, :call, {:tracer, recorder}])
    :erlang.trace(self(), true, [:call, {:tracer, recorder}])
    pid
  end

  # `ports` has what is left of each one's last read.
  defp loop(agent, ports) do
    receive do
      {:trace, _, :receive, {port, {:data, bytes}}} when is_port(port) ->
        rest = Map.get(ports, port, Frames.new(@max_frame))
        {frames, rest} = Frames.cut(rest, bytes)
        for frame <- frames, do: record(agent, "< ", frame)
        loop(agent, Map.put(ports, port, rest))

      {:trace, _, :call, {:erlang, :port_command, [_port, bytes, _options]}} ->
        <<_length::32, frame::binary>> = IO.iodata_to_binary(bytes)
        record(agent, "> ", frame)
        loop(agent, ports)

      _other ->
        loop(agent, ports)
    end
  end

  defp record(agent, direction, frame),
    do: Agent.update(agent, &[direction <> Base.encode16(frame, case: :lower) | &1])
end

recorder = Recorder.start()
options = [max_model_len: 256, enforce_eager: true, kv_cache_memory_bytes: 67_108_864]
tool = %{type: "function", function: %{name: "weather", parameters: %{type: "object"}}}

llm = VLLM.llm!("priv/models/demo", options)
prompt = "The capital of France is"
VLLM.generate!(llm, prompt, temperature: 0.0, max_tokens: 8)
VLLM.generate!(llm, prompt, n: 2, logprobs: 2, prompt_logprobs: 1, max_tokens: 4, seed: 7)
VLLM.generate!(llm, prompt, schema: %{type: "object"}, max_tokens: 8, stop: ["}"])
VLLM.beam_search!(llm, prompt, beam_width: 2, max_tokens: 3)
Enum.to_list(VLLM.stream(llm, prompt, max_tokens: 6, logprobs: 1, temperature: 0.0))
Enum.take(VLLM.stream(llm, prompt, max_tokens: 100, ignore_eos: true), 1)
messages = [%{role: "user", content: "Hello!"}]
VLLM.chat!(llm, messages, tools: [tool], tool_call_parser: "hermes", max_tokens: 8)
Enum.to_list(VLLM.chat_stream(llm, messages, max_tokens: 8))
VLLM.apply_chat_template!(llm, messages)
tokens = VLLM.tokenize!(llm, "Grüße, 漢字 🙂")
VLLM.detokenize!(llm, tokens)
{:error, _} = VLLM.generate(llm, String.duplicate("word ", 500))
{:error, _} = VLLM.generate(llm, prompt, temperature: -1.0)
{:error, _} = VLLM.generate(llm, prompt, timeout: 50, max_tokens: 200, ignore_eos: true)
VLLM.reset_prefix_cache(llm)
VLLM.metrics(llm)
VLLM.stop(llm)

llm = VLLM.llm!("priv/models/demo", [enable_lora: true] ++ options)
adapter = VLLM.lora_request!("demo-lora", 1, "priv/models/demo-lora")
VLLM.load_lora(llm, adapter)
VLLM.list_loras!(llm)
VLLM.generate!(llm, prompt, lora_request: adapter, max_tokens: 4)
VLLM.stop(llm)

llm = VLLM.llm!("priv/models/demo", [runner: "pooling", convert: "embed"] ++ options)
VLLM.embed!(llm, prompt)
VLLM.score!(llm, "One", ["Two", "Three"])
VLLM.stop(llm)

# The folders of this machine become others of the same length, so that the frames stay whole.
folders =
  for folder <- [File.cwd!(), System.user_home!()] do
    other = "/" <> String.duplicate("x", byte_size(folder) - 1)
    {Base.encode16(folder, case: :lower), Base.encode16(other, case: :lower)}
  end

for line <- recorder |> Agent.get(& &1) |> Enum.reverse() do
  IO.puts(Enum.reduce(folders, line, fn {old, new}, line -> String.replace(line, old, new) end))
end
