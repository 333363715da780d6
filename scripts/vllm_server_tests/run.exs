# vLLM's own tests of its server, of the source package of the vLLM that is installed, against `VLLM.Server` and
# against vLLM's own server, both with the demo model and the same options: all tests of the paths that are served
# here whose files a small model can pass some of. Prints what each side has of each file, and what only one has.
#
#     MIX_ENV=test mix run scripts/vllm_server_tests/run.exs [--only ours|theirs] [--folder FOLDER] [FILE…]
#
#   --only     one of the two sides
#   --folder   where the package and what its tests import beside it are, or are downloaded to
#   FILE       as below
#
# What pytest says is in ours.log and theirs.log of the folder. Ends with status 1 where a test passes with vLLM's
# server alone.

Logger.configure(level: :error)
Code.require_file("source.exs", __DIR__)
Code.require_file("../../bench/beside.exs", __DIR__)

defmodule VLLMServerTests do
  alias Bench.Beside
  alias VLLM.{DemoModel, JSON, LoRARequest, Server}

  # Which server each file asks.
  @files [
    {:generate, "openai/models/test_models.py"},
    {:generate, "openai/completion/test_completion.py"},
    {:generate, "openai/chat_completion/test_chat.py"},
    {:generate, "openai/chat_completion/test_chat_completion.py"},
    {:generate, "openai/chat_completion/test_chat_echo.py"},
    {:generate, "openai/chat_completion/test_chat_logit_bias_validation.py"},
    {:generate, "openai/chat_completion/test_completion_with_function_calling.py"},
    {:generate, "openai/chat_completion/test_logprob_token_ids.py"},
    {:generate, "openai/responses/test_basic.py"},
    {:generate, "openai/responses/test_simple.py"},
    {:generate, "openai/responses/test_function_call.py"},
    {:generate, "openai/responses/test_structured_output.py"},
    {:generate, "openai/test_return_token_ids.py"},
    {:generate, "openai/test_return_tokens_as_ids.py"},
    {:generate, "openai/test_chunked_prompt.py"},
    {:generate, "anthropic/test_messages.py"},
    {:generate, "serve/tokenize/test_tokenization.py"},
    {:embed, "pooling/embed/test_online.py"},
    {:embed, "pooling/scoring/test_bi_encoder_online.py"}
  ]

  # But for the tests of paths that are not served here.
  @served "not test_invocations and not test_pooling and not test_tokenizer_info"
  # What ends the engine of vLLM's own server on a CPU, and with it all later tests.
  @asked %{ours: @served, theirs: @served <> " and not prompt_logprobs"}

  # What they call the model and the adapter.
  @names %{
    generate:
      ~w(Qwen/Qwen3-0.6B Qwen/Qwen3-1.7B Qwen/Qwen3-8B Qwen/Qwen2-1.5B-Instruct Qwen/Qwen2.5-1.5B-Instruct) ++
        ~w(facebook/opt-125m HuggingFaceH4/zephyr-7b-beta HuggingFaceTB/SmolLM2-135M-Instruct) ++
        ~w(claude-3-7-sonnet-latest),
    embed: ~w(intfloat/multilingual-e5-small BAAI/bge-base-en-v1.5)
  }
  @adapters %{generate: ~w(zephyr-lora qwen3-lora), embed: []}

  @shared [enforce_eager: true, kv_cache_memory_bytes: 268_435_456, max_num_seqs: 128]
  @options %{
    generate: [max_model_len: 2048, enable_lora: true, max_cpu_loras: 2],
    embed: [max_model_len: 512, runner: "pooling", convert: "embed"]
  }

  def run(folder, sides, wanted) do
    File.mkdir_p!(folder)
    source = VLLMSource.bring(folder)
    for side <- sides, do: File.rm(Path.join(folder, "#{side}.log"))

    for kind <- [:generate, :embed],
        files = for({^kind, file} <- @files, wanted == [] or file in wanted, do: file),
        files != [],
        reduce: 0 do
      lost ->
        outcomes =
          for side <- sides, into: %{} do
            {side, serve(side, kind, &pytest(folder, source, side, files, &1))}
          end

        print(files, outcomes)
        lost + differences(outcomes)
    end
  end

  defp serve(:ours, kind, ask) do
    llm =
      VLLM.llm!(DemoModel.path(), [served_model_name: @names[kind]] ++ @shared ++ @options[kind])

    for name <- @adapters[kind],
        do: :ok = VLLM.load_lora(llm, LoRARequest.new(name, DemoModel.path("demo-lora")))

    parser = if kind == :generate, do: [tool_call_parser: "hermes"], else: []
    {:ok, server} = Server.start_link(models: [[engine: llm] ++ parser], port: 0, tokenize: true)
    said = server |> Server.url() |> String.replace_suffix("/v1", "") |> ask.()
    Process.unlink(server)
    Supervisor.stop(server)
    VLLM.stop(llm)
    said
  end

  # With the executor that this library takes on few cores.
  defp serve(:theirs, kind, ask) do
    {:ok, socket} = :gen_tcp.listen(0, [])
    {:ok, port} = :inet.port(socket)
    :gen_tcp.close(socket)

    of_kind =
      if kind == :generate do
        adapters = for name <- @adapters[kind], do: "#{name}=#{DemoModel.path("demo-lora")}"
        [enable_auto_tool_choice: true, tool_call_parser: "hermes", lora_modules: adapters]
      else
        []
      end

    options = [port: port, served_model_name: @names[kind]] ++ @shared ++ @options[kind] ++ of_kind
    server = Beside.start("serve", DemoModel.path(), options, "uni")
    said = ask.("http://127.0.0.1:#{port}")
    # It ends with what it is asked by.
    Port.close(server)
    said
  end

  # What has become of each test, by its name.
  defp pytest(folder, source, side, files, url) do
    report = Path.join(folder, "#{side}.jsonl")
    File.rm(report)

    environment = [
      {"VLLM_TESTS_URL", url},
      {"VLLM_TESTS_MODEL", DemoModel.path()},
      {"VLLM_TESTS_REPORT", report},
      {"HF_HUB_OFFLINE", "1"},
      {"PYTHONPATH", Enum.join([source.tests, __DIR__, source.packages], ":")}
    ]

    args =
      ~w(-m pytest -p plugin --noconftest -p no:cacheprovider -q --tb=short -o asyncio_mode=auto -k) ++
        [
          @asked[side],
          "--rootdir",
          source.tests | for(file <- files, do: "#{source.tests}/tests/entrypoints/#{file}")
        ]

    {:ok, python} = VLLM.Python.executable()

    {said, _status} =
      System.cmd(python, args, env: environment, stderr_to_stdout: true, cd: folder)

    File.write!(Path.join(folder, "#{side}.log"), said, [:append])

    for line <- report |> File.read!() |> String.split("\n", trim: true), into: %{} do
      {:ok, %{"test" => test, "outcome" => outcome, "why" => why}} = JSON.decode(line)
      {String.replace_prefix(test, "tests/entrypoints/", ""), {outcome, why}}
    end
  end

  defp print(files, outcomes) do
    sides = Map.keys(outcomes)
    heads = for side <- sides, what <- ~w(passed failed skipped), do: "#{what}, #{side}"
    IO.puts("\n| file | #{Enum.join(heads, " | ")} |")
    IO.puts("|#{String.duplicate(" --- |", length(heads) + 1)}")

    for file <- files do
      counts =
        for side <- sides,
            what <- ~w(passed failed skipped),
            do: Enum.count(outcomes[side], &match?({^file, ^what}, {file(&1), outcome(&1)}))

      IO.puts("| #{file} | #{Enum.join(counts, " | ")} |")
    end

    for {side, tests} <- outcomes, {test, {"failed", why}} <- Enum.sort(tests) do
      IO.puts("#{side}: #{test}: #{why |> String.split("\n") |> hd()}")
    end
  end

  defp file({test, _said}), do: test |> String.split("::") |> hd()
  defp outcome({_test, {outcome, _why}}), do: outcome

  # Says which tests end otherwise, and how many pass with vLLM's server alone.
  defp differences(%{ours: ours, theirs: theirs}) do
    differing =
      for test <- Map.keys(Map.merge(ours, theirs)),
          elem(ours[test] || {nil}, 0) != elem(theirs[test] || {nil}, 0),
          do: test

    for test <- Enum.sort(differing),
        do: IO.puts("#{test}: #{inspect(ours[test])} here, #{inspect(theirs[test])} there")

    Enum.count(differing, &match?({"passed", _}, theirs[&1]))
  end

  defp differences(_one_side), do: 0
end

{options, files} = OptionParser.parse!(System.argv(), strict: [only: :string, folder: :string])

folder = options[:folder] || Path.join(System.tmp_dir!(), "vllm-server-tests")
sides = for side <- [:ours, :theirs], options[:only] in [nil, "#{side}"], do: side
if VLLMServerTests.run(Path.expand(folder), sides, files) > 0, do: System.halt(1)
