# The server that test/run drives: the demo model, the page, and a key that may use it.

Application.put_env(:ex_vllm, :data_dir, System.fetch_env!("DASHBOARD_DATA"))

engine =
  {VLLM,
   name: Demo.LLM,
   model: System.fetch_env!("DEMO_MODEL"),
   max_model_len: 2048,
   enforce_eager: true,
   kv_cache_memory_bytes: 64 * 1024 * 1024}

{:ok, _supervisor} = Supervisor.start_link([engine], strategy: :one_for_one)

{:ok, server} =
  VLLM.Server.start_link(
    models: [{"demo", Demo.LLM}],
    web: true,
    port: 0,
    api_keys: [{"key-of-the-test", admin: true}]
  )

IO.puts("dashboard: #{String.replace_suffix(VLLM.Server.url(server), "v1", "")}")
Process.sleep(:infinity)
