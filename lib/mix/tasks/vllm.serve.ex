defmodule Mix.Tasks.Vllm.Serve do
  @shortdoc "Serves models over HTTP, as OpenAI's API"

  @moduledoc """
  Serves models over HTTP, as OpenAI's API.

      mix vllm.serve MODEL… [--port 8000] [--ip 127.0.0.1] [OPTIONS]

      mix vllm.serve /models/Llama-3.1-8B-AWQ --max-model-len 8192 --tool-call-parser llama3_json
      mix vllm.serve /models/Llama-3.1-8B-AWQ --web

  Starts an engine for each model, then a `VLLM.Server`, and runs until `Ctrl-C`. Ends with status 1 where
  an engine cannot start. Clients give the models the names that they have here, or that of
  `--served-model-name`.

  With `--web` there is a page at the server's address as well, which shows engines and jobs and has them
  started and stopped.

  ## Options

  Those of `VLLM.Server` (`--port`, `--ip`, `--max-concurrent-requests`, `--timeout`, …) and of an engine, for
  each of the models, by their names with `-` for `_`; `--tool-call-parser` and `--chat-template` of
  a model in `VLLM.Server`.

  ## Environment

    * `LLM_API_KEYS` - the keys of which a request must have one, with commas between them
    * `LLM_ALLOWED_MODELS` - the only models that may be served, with commas between them; `*` in a name
      stands for anything
    * `LLM_MAX_CONCURRENT_REQUESTS` - as `--max-concurrent-requests`
    * `LLM_ENABLE_ISQ`, `LLM_ISQ_TYPE` - with `true`, plain models are quantized in place at their first
      start, as `--isq` has it; to `Q4_K` unless a type is given
    * `HF_HOME`, `HF_TOKEN` - where downloaded models are, and the token for them

  What is on the command line counts before what is in the environment.
  """

  use Mix.Task

  alias Mix.Vllm.{Answer, Arguments}
  alias VLLM.{Options, Server}

  @requirements ["app.start"]

  @of_models ~w(tool_call_parser chat_template)

  # Where no type is given.
  @isq "Q4_K"

  @impl Mix.Task
  def run(argv) do
    {models, engine, server} = options(argv, System.get_env())
    {settings, server} = Map.split(server, @of_models)

    served =
      for model <- models do
        llm = model |> VLLM.llm(engine) |> Answer.ok!()
        [{:engine, llm} | Enum.map(settings, fn {name, value} -> {setting(name), value} end)]
      end

    web? = server["web"] == true
    server = server |> Map.put("models", served) |> Server.start_link() |> Answer.ok!()
    Mix.shell().info("Serving #{Enum.join(models, ", ")} at #{Server.url(server)}")
    if web?, do: Mix.shell().info("The page is at #{URI.merge(Server.url(server), "/")}")
    Process.sleep(:infinity)
  end

  defp setting("tool_call_parser"), do: :tool_call_parser
  defp setting("chat_template"), do: :chat_template

  @doc "The models, the options of their engines, and those of the server."
  @spec options([String.t()], %{String.t() => String.t()}) ::
          {[String.t(), ...], %{String.t() => term()}, %{String.t() => term()}}
  def options(argv, env) do
    switches = for {name, :boolean, _default, _doc} <- Options.server(), do: Atom.to_string(name)
    {models, given, []} = Arguments.parse_all!(argv, "vllm.serve", [], switches)
    names = Options.names(Options.server()) -- [:models, :allowed_models]
    {server, engine} = Map.split(given, Enum.map(names, &Atom.to_string/1) ++ @of_models)
    {models, Map.merge(engine_env(env), engine), Map.merge(server_env(env), server)}
  end

  defp server_env(env) do
    from(env, %{
      "LLM_API_KEYS" => "api_keys",
      "LLM_MAX_CONCURRENT_REQUESTS" => "max_concurrent_requests"
    })
  end

  defp engine_env(env) do
    isq =
      if String.downcase(env["LLM_ENABLE_ISQ"] || "") in ["true", "1", "yes"],
        do: %{"isq" => env["LLM_ISQ_TYPE"] || @isq},
        else: %{}

    Map.merge(isq, from(env, %{"LLM_ALLOWED_MODELS" => "allowed_models"}))
  end

  defp from(env, names) do
    for {variable, name} <- names, value = env[variable], value != "", into: %{} do
      {name, read(name, value)}
    end
  end

  # A key may look like a number.
  defp read("api_keys", text), do: Arguments.list(text)
  defp read(name, text), do: Arguments.value(name, text)
end
